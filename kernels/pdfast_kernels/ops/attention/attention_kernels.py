"""The kernels of `attention`, on q, k, v read by stride: see attention.py for the mathematics and the contract."""

from pdfast_kernels.runtime.triton import jit, tl


@jit
def _pair(blocks, heads):
    """Return the block, sample and head of a program; int64, since they are multiplied by strides."""
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    return block.to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@jit
def _load_rows(ptr, stride, rows, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_L, BLOCK_D] from `ptr` on, zero from row `rows` and column D on; EVEN says that no row is."""
    row, d = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    place = ptr + row * stride + d
    if EVEN and D == BLOCK_D:
        return tl.load(place)
    if EVEN:
        return tl.load(place, mask=d < D, other=0.0)
    if D == BLOCK_D:
        return tl.load(place, mask=row < rows, other=0.0)
    return tl.load(place, mask=(row < rows) & (d < D), other=0.0)


@jit
def _store_rows(ptr, values, stride, rows, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    row, d = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + row * stride + d, values.to(ptr.dtype.element_ty), mask=(row < rows) & (d < D))


@jit
def _load_statistic(ptr, rows, BLOCK_L: tl.constexpr, EVEN: tl.constexpr):
    """Zero from `rows` on, so that e^(s - lse) is finite there: such queries are all zero, and so are their scores."""
    row = tl.arange(0, BLOCK_L)
    if EVEN:
        return tl.load(ptr + row)
    return tl.load(ptr + row, mask=row < rows, other=0.0)


@jit
def forward_resident(
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE2: tl.constexpr,  # scale log2(e)
    UNIT: tl.constexpr,  # of the strides, so that the compiler knows a divisor of theirs
    EVEN: tl.constexpr,  # L is a multiple of BLOCK and of STEP
    SHARE: tl.constexpr,  # query blocks of a program
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # at least L
    BLOCK_D: tl.constexpr,
):
    share, n, h = _pair(tl.cdiv(L, SHARE * BLOCK), heads)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, STEP, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, STEP, BLOCK_D, EVEN)
    first = share * (SHARE * BLOCK)
    q_ptr += (n * q_n + h * q_h + first * q_l) * UNIT
    out_ptr += ((n * L + first) * heads + h) * D
    lse_ptr += (n * heads + h) * L + first
    row = tl.arange(0, BLOCK)
    for start in range(0, SHARE * BLOCK, BLOCK):
        rows = L - first - start
        q = _load_rows(q_ptr, q_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        top = tl.max(score, axis=1) * SCALE2
        p = tl.exp2(score * SCALE2 - top[:, None])
        total = tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        _store_rows(out_ptr, out, heads * D, rows, D, BLOCK, BLOCK_D)
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < rows)
        q_ptr += BLOCK * q_l * UNIT
        out_ptr += BLOCK * heads * D
        lse_ptr += BLOCK


@jit
def forward_stream(
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, n, h = _pair(tl.cdiv(L, BLOCK), heads)
    first = block * BLOCK
    rows = L - first
    q = _load_rows(q_ptr + (n * q_n + h * q_h + first * q_l) * UNIT, q_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
    k_ptr += (n * k_n + h * k_h) * UNIT
    v_ptr += (n * v_n + h * v_h) * UNIT

    # Milakov & Gimelshein 2018: the running maximum (of scores in base 2), denominator and numerator.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        k = _load_rows(k_ptr, k_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((start + tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1) * SCALE2)
        p = tl.exp2(score * SCALE2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None]
        v = _load_rows(v_ptr, v_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        top = higher
        k_ptr += STEP * k_l * UNIT
        v_ptr += STEP * v_l * UNIT
    out = out / total[:, None]

    out_ptr += ((n * L + first) * heads + h) * D
    _store_rows(out_ptr, out, heads * D, rows, D, BLOCK, BLOCK_D)
    row = tl.arange(0, BLOCK)
    tl.store(lse_ptr + (n * heads + h) * L + first + row, top + tl.log2(total), mask=row < rows)


@jit
def backward_tile(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,  # of dq, dk and dv alike
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L
    BLOCK_D: tl.constexpr,
):
    _, n, h = _pair(1, heads)
    q = _load_rows(q_ptr + (n * q_n + h * q_h) * UNIT, q_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    grad = _load_rows(grad_ptr + (n * L * heads + h) * D, heads * D, L, D, BLOCK, BLOCK_D, EVEN)
    lse = _load_statistic(lse_ptr + (n * heads + h) * L, L, BLOCK, EVEN)
    place = (n * d_n + h * d_h) * UNIT

    score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
    if not EVEN:  # a key that is not there has score 0, and e^(0 - lse) may be infinite
        score = tl.where((tl.arange(0, BLOCK) < L)[:, None], score, float("-inf"))
    p_t = tl.exp2(score * SCALE2 - lse[None, :])
    dv = tl.dot(p_t.to(grad.dtype), grad, input_precision="ieee")
    _store_rows(dv_ptr + place, dv, d_l * UNIT, L, D, BLOCK, BLOCK_D)

    dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
    delta = tl.sum(p_t * dp_t, axis=0)  # rowsum(grad out), without reading out
    ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds_t, q, input_precision="ieee") * SCALE
    _store_rows(dk_ptr + place, dk, d_l * UNIT, L, D, BLOCK, BLOCK_D)
    dq = tl.dot(tl.trans(ds_t), k, input_precision="ieee") * SCALE
    _store_rows(dq_ptr + place, dq, d_l * UNIT, L, D, BLOCK, BLOCK_D)


@jit
def backward_resident(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, n, h = _pair(1, heads)
    k = _load_rows(k_ptr + (n * k_n + h * k_h) * UNIT, k_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    v = _load_rows(v_ptr + (n * v_n + h * v_h) * UNIT, v_l * UNIT, L, D, BLOCK, BLOCK_D, EVEN)
    q_ptr += (n * q_n + h * q_h) * UNIT
    grad_ptr += (n * L * heads + h) * D
    lse_ptr += (n * heads + h) * L
    place = (n * d_n + h * d_h) * UNIT
    dq_ptr += place

    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        q = _load_rows(q_ptr, q_l * UNIT, L - start, D, STEP, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr, heads * D, L - start, D, STEP, BLOCK_D, EVEN)
        lse = _load_statistic(lse_ptr + start, L - start, STEP, EVEN)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        if not EVEN:  # a key that is not there has score 0, and e^(0 - lse) may be infinite
            score = tl.where((tl.arange(0, BLOCK) < L)[:, None], score, float("-inf"))
        p_t = tl.exp2(score * SCALE2 - lse[None, :])
        dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dv = tl.dot(p_t.to(grad.dtype), grad, dv, input_precision="ieee")
        delta = tl.sum(p_t * dp_t, axis=0)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds_t, q, dk, input_precision="ieee")
        dq_t = tl.dot(tl.trans(k), ds_t, input_precision="ieee") * SCALE
        _store_rows(dq_ptr, tl.trans(dq_t), d_l * UNIT, L - start, D, STEP, BLOCK_D)
        q_ptr += STEP * q_l * UNIT
        grad_ptr += STEP * heads * D
        dq_ptr += STEP * d_l * UNIT
    _store_rows(dk_ptr + place, dk * SCALE, d_l * UNIT, L, D, BLOCK, BLOCK_D)
    _store_rows(dv_ptr + place, dv, d_l * UNIT, L, D, BLOCK, BLOCK_D)


@jit
def row_products(
    grad_ptr,  # [N, L, heads, D]
    out_ptr,  # [N, L, heads, D]
    delta_ptr,  # [N, heads, L]: sums of grad out over D
    L,
    heads,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, n, h = _pair(tl.cdiv(L, BLOCK), heads)
    first = block * BLOCK
    rows = L - first
    place = ((n * L + first) * heads + h) * D
    grad = _load_rows(grad_ptr + place, heads * D, rows, D, BLOCK, BLOCK_D, False).to(tl.float32)
    out = _load_rows(out_ptr + place, heads * D, rows, D, BLOCK, BLOCK_D, False).to(tl.float32)
    row = tl.arange(0, BLOCK)
    tl.store(delta_ptr + (n * heads + h) * L + first + row, tl.sum(grad * out, axis=1), mask=row < rows)


@jit
def _key_gradients(
    q_ptr,
    q_l,
    k,
    v,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    rows,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    EVEN: tl.constexpr,
    OF_K: tl.constexpr,
    OF_V: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of a block of keys, over all queries; zero where not wanted."""
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        q = _load_rows(q_ptr, q_l, L - start, D, STEP, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr, heads * D, L - start, D, STEP, BLOCK_D, EVEN)
        lse = _load_statistic(lse_ptr + start, L - start, STEP, EVEN)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        if not EVEN:
            score = tl.where((tl.arange(0, BLOCK) < rows)[:, None], score, float("-inf"))
        p_t = tl.exp2(score * SCALE2 - lse[None, :])
        if OF_K:
            dp_t = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if OF_V:
            dv = tl.dot(p_t.to(grad.dtype), grad, dv, input_precision="ieee")
        if OF_K:
            delta = _load_statistic(delta_ptr + start, L - start, STEP, EVEN)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += STEP * q_l
        grad_ptr += STEP * heads * D
    return dk * SCALE, dv


@jit
def _query_gradients(
    q,
    k_ptr,
    k_l,
    v_ptr,
    v_l,
    grad,
    lse,
    delta,
    L,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of a block of queries, over all keys."""
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, L, STEP):
        k = _load_rows(k_ptr, k_l, L - start, D, STEP, BLOCK_D, EVEN)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not EVEN:
            score = tl.where((start + tl.arange(0, STEP) < L)[None, :], score, float("-inf"))
        p = tl.exp2(score * SCALE2 - lse[:, None])
        v = _load_rows(v_ptr, v_l, L - start, D, STEP, BLOCK_D, EVEN)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_ptr += STEP * k_l
        v_ptr += STEP * v_l
    return dq * SCALE


@jit
def backward_stream(
    grad_ptr,  # [N, L, heads, D]
    q_ptr,  # [N, L, heads, D]
    k_ptr,  # [N, L, heads, D]
    v_ptr,  # [N, L, heads, D]
    lse_ptr,  # [N, heads, L]
    delta_ptr,  # [N, heads, L]
    dq_ptr,  # [N, L, heads, D]
    dk_ptr,  # [N, L, heads, D]
    dv_ptr,  # [N, L, heads, D]
    q_n,
    q_l,
    q_h,
    k_n,
    k_l,
    k_h,
    v_n,
    v_l,
    v_h,
    d_n,
    d_l,
    d_h,
    L,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE2: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    APART: tl.constexpr,  # dk and dv by two programs: together their sums do not fit in the registers
    BLOCK: tl.constexpr,  # of keys
    QUERIES: tl.constexpr,  # in a block of them
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The programs of a pair follow each other, so that they read the same from L2: of dk and dv, then of dq.
    blocks = tl.cdiv(L, BLOCK)
    of_keys = 2 * blocks if APART else blocks
    program, n, h = _pair(of_keys + tl.cdiv(L, QUERIES), heads)
    q_ptr += (n * q_n + h * q_h) * UNIT
    k_ptr += (n * k_n + h * k_h) * UNIT
    v_ptr += (n * v_n + h * v_h) * UNIT
    grad_ptr += (n * L * heads + h) * D
    lse_ptr += (n * heads + h) * L
    delta_ptr += (n * heads + h) * L
    place = (n * d_n + h * d_h) * UNIT
    dq_ptr += place
    dk_ptr += place
    dv_ptr += place

    if program < blocks:
        first = program * BLOCK
        rows = L - first
        k = _load_rows(k_ptr + first * k_l * UNIT, k_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        v = _load_rows(v_ptr + first * v_l * UNIT, v_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        dk, dv = _key_gradients(
            q_ptr, q_l * UNIT, k, v, grad_ptr, lse_ptr, delta_ptr, rows, L, heads, D, SCALE, SCALE2, EVEN, True,
            not APART, BLOCK, STEP, BLOCK_D
        )  # fmt: skip
        _store_rows(dk_ptr + first * d_l * UNIT, dk, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
        if not APART:
            _store_rows(dv_ptr + first * d_l * UNIT, dv, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
    elif program >= of_keys:
        first = (program - of_keys) * QUERIES
        rows = L - first
        q = _load_rows(q_ptr + first * q_l * UNIT, q_l * UNIT, rows, D, QUERIES, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr + first * heads * D, heads * D, rows, D, QUERIES, BLOCK_D, EVEN)
        lse = _load_statistic(lse_ptr + first, rows, QUERIES, EVEN)
        delta = _load_statistic(delta_ptr + first, rows, QUERIES, EVEN)
        dq = _query_gradients(
            q, k_ptr, k_l * UNIT, v_ptr, v_l * UNIT, grad, lse, delta, L, D, SCALE, SCALE2, EVEN, QUERIES, STEP, BLOCK_D
        )
        _store_rows(dq_ptr + first * d_l * UNIT, dq, d_l * UNIT, rows, D, QUERIES, BLOCK_D)
    elif APART:
        first = (program - blocks) * BLOCK
        rows = L - first
        k = _load_rows(k_ptr + first * k_l * UNIT, k_l * UNIT, rows, D, BLOCK, BLOCK_D, EVEN)
        _, dv = _key_gradients(
            q_ptr, q_l * UNIT, k, k, grad_ptr, lse_ptr, delta_ptr, rows, L, heads, D, SCALE, SCALE2, EVEN, False,
            True, BLOCK, STEP, BLOCK_D
        )  # fmt: skip
        _store_rows(dv_ptr + first * d_l * UNIT, dv, d_l * UNIT, rows, D, BLOCK, BLOCK_D)
