"""The kernels of `group_norm`, on x as [N, rows, C] in memory: see group_norm.py for the mathematics and the contract."""

from pdfast_kernels.runtime.triton import INTERPRETED, jit, tl

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter has no instructions of a GPU
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@jit
def _group_sums(values, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_C] -> [BLOCK_G]: sums over the CPG channels of each group."""
    member = (tl.arange(0, BLOCK_C) // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@jit
def _group_sums_of_tile(values, CPG: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_R, BLOCK_C] -> [BLOCK_G]: sums over the rows and channels of each group."""
    if BLOCK_G * CPG == BLOCK_C:  # a thread adds up what it has of a group before threads exchange anything
        return tl.sum(tl.sum(tl.reshape(values, (BLOCK_R, BLOCK_G, CPG)), axis=2), axis=0)
    return _group_sums(tl.sum(values, axis=0), CPG, BLOCK_C, BLOCK_G)


@jit
def _of_channels(values, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G] -> [BLOCK_C]: each channel's group value."""
    member = (tl.arange(0, BLOCK_C) // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@jit
def _gain_and_offset(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside):
    """u = gain xhat + offset, for channels c of sample n: float32 like c."""
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        film = 1.0 + tl.load(scale_ptr + n * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
        gain *= film
        offset *= film
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + n * shift_stride + c, mask=inside, other=0.0).to(tl.float32)
    return gain, offset


@jit
def _part(rows, C: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program of a streaming kernel: sample, channel block, row chunk, and how many chunks a sample has.

    On one axis of the grid: the others end at 65535.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunks = tl.cdiv(rows, TILES * BLOCK_R)
    part = tl.program_id(0) // chunks
    return (part // BLOCKS).to(tl.int64), part % BLOCKS, tl.program_id(0) % chunks, chunks


@jit
def _part_from_the_end(rows, C: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the same, but the last sample first: what was read last is still in the L2 cache."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n, block, chunk, chunks = _part(rows, C, TILES, BLOCK_R, BLOCK_C)
    return tl.num_programs(0) // (chunks * BLOCKS) - 1 - n, block, chunk


@jit
def _sigmoid(u):
    """1 / (1 + exp(-u)) in four instructions, to about 2^-22 of it; 0 below 2^-126."""
    if _PLAIN:
        return 1.0 / (1.0 + tl.exp(-u))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [u * _MINUS_LOG2_E], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def _activate(u, SILU: tl.constexpr):
    return u * _sigmoid(u) if SILU else u


@jit
def _gradient_of_u(dy, u, SILU: tl.constexpr):
    if SILU:
        sigmoid = _sigmoid(u)
        dy = dy * (sigmoid + u * sigmoid * (1.0 - sigmoid))
    return dy


@jit
def forward_resident(
    x_ptr,  # [N, ROWS, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    y_ptr,  # [N, ROWS, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    scale_stride,
    shift_stride,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CPG: tl.constexpr,  # channels of a group
    CHANNELS: tl.constexpr,  # channels of a program, whole groups
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * CHANNELS
    row, lane = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    c = first + lane
    inside_c = (lane < CHANNELS) & (c < C)
    inside = (row < ROWS)[:, None] & inside_c[None, :]
    place = n * ROWS * C + row[:, None] * C + c[None, :]

    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean_g = _group_sums_of_tile(x, CPG, BLOCK_R, BLOCK_C, BLOCK_G) / (ROWS * CPG)
    centred = tl.where(inside, x - _of_channels(mean_g, CPG, BLOCK_C, BLOCK_G)[None, :], 0.0)
    variance_g = _group_sums_of_tile(centred * centred, CPG, BLOCK_R, BLOCK_C, BLOCK_G) / (ROWS * CPG)
    rstd_g = tl.rsqrt(variance_g + EPS)

    gain, offset = _gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside_c
    )
    gain *= _of_channels(rstd_g, CPG, BLOCK_C, BLOCK_G)
    y = _activate(centred * gain[None, :] + offset[None, :], SILU)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)

    g = first // CPG + tl.arange(0, BLOCK_G)
    inside_g = (tl.arange(0, BLOCK_G) < CHANNELS // CPG) & (g < C // CPG)
    tl.store(mean_ptr + n * (C // CPG) + g, mean_g, mask=inside_g)
    tl.store(rstd_ptr + n * (C // CPG) + g, rstd_g, mask=inside_g)


@jit
def chunk_moments(
    x_ptr,  # [N, rows, C]
    partial_ptr,  # [N, chunks, 2, C]: mean, sum of squared deviations
    rows,
    C: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded at a time
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, block, chunk, chunks = _part(rows, C, TILES, BLOCK_R, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = chunk * (TILES * BLOCK_R)
    count = tl.minimum(rows - first, TILES * BLOCK_R).to(tl.float32)

    # Deviations from the mean of the first tile: near the chunk's own, so that what is subtracted at the end is small.
    inside = (first + tl.arange(0, BLOCK_R) < rows)[:, None] & (c < C)[None, :]
    place = (n * rows + first + tl.arange(0, BLOCK_R))[:, None] * C + c[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    origin = tl.sum(x, axis=0) / tl.minimum(rows - first, BLOCK_R).to(tl.float32)
    deviation = tl.where(inside, x - origin[None, :], 0.0)
    total, squares = deviation, deviation * deviation
    for tile in tl.range(1, TILES, num_stages=STAGES):
        row = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        place = (n * rows + row)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, x - origin[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    shift = tl.sum(total, axis=0) / count
    squares_c = tl.sum(squares, axis=0) - shift * shift * count

    out = (n * chunks + chunk) * 2 * C + c
    tl.store(partial_ptr + out, origin + shift, mask=c < C)
    tl.store(partial_ptr + out + C, squares_c, mask=c < C)


@jit
def merge_moments(
    partial_ptr,  # [N, chunks, 2, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    rows,
    chunks,
    C: tl.constexpr,
    CPG: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_CPG: tl.constexpr,
):
    n = (tl.program_id(0) // (C // CPG)).to(tl.int64)
    g = tl.program_id(0) % (C // CPG)
    partial_ptr += n * chunks * 2 * C + g * CPG
    origin = tl.load(partial_ptr)
    total = tl.zeros((BLOCK_K, BLOCK_CPG), tl.float32)
    for first in range(0, CPG, BLOCK_CPG):
        lane = first + tl.arange(0, BLOCK_CPG)
        for start in range(0, chunks, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < chunks)[:, None] & (lane < CPG)[None, :]
            count = tl.minimum(rows - k * CHUNK_ROWS, CHUNK_ROWS).to(tl.float32)
            mean = tl.load(partial_ptr + k[:, None] * 2 * C + lane[None, :], mask=inside, other=0.0)
            total += tl.where(inside, (mean - origin) * count[:, None], 0.0)
    values = tl.cast(rows, tl.float32) * CPG  # of an int or, since 1 is compiled in, of a constant
    shift = tl.sum(tl.sum(total, axis=1), axis=0) / values
    squares = tl.zeros((BLOCK_K, BLOCK_CPG), tl.float32)
    for first in range(0, CPG, BLOCK_CPG):
        lane = first + tl.arange(0, BLOCK_CPG)
        for start in range(0, chunks, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < chunks)[:, None] & (lane < CPG)[None, :]
            count = tl.minimum(rows - k * CHUNK_ROWS, CHUNK_ROWS).to(tl.float32)
            place = k[:, None] * 2 * C + lane[None, :]
            deviation = tl.load(partial_ptr + place, mask=inside, other=0.0) - origin - shift
            own = tl.load(partial_ptr + place + C, mask=inside, other=0.0)
            squares += tl.where(inside, own + deviation * deviation * count[:, None], 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / values
    tl.store(mean_ptr + n * (C // CPG) + g, origin + shift)
    tl.store(rstd_ptr + n * (C // CPG) + g, tl.rsqrt(variance + EPS))


@jit
def apply(
    x_ptr,  # [N, rows, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    y_ptr,  # [N, rows, C]
    scale_stride,
    shift_stride,
    rows,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded at a time
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, block, chunk = _part_from_the_end(rows, C, TILES, BLOCK_R, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    group = n * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=inside_c, other=0.0)
    gain, offset = _gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside_c
    )
    gain *= tl.load(rstd_ptr + group, mask=inside_c, other=0.0)
    for tile in tl.range(TILES, num_stages=STAGES):
        row = (chunk * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & inside_c[None, :]
        place = (n * rows + row)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = _activate((x - mean[None, :]) * gain[None, :] + offset[None, :], SILU)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def backward_resident(
    dy_ptr,  # [N, ROWS, C]
    x_ptr,  # [N, ROWS, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, ROWS, C]
    sums_ptr,  # [N, 2, C]: of du and of du xhat
    scale_stride,
    shift_stride,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CPG: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row, lane = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    c = tl.program_id(0) % BLOCKS * CHANNELS + lane
    inside_c = (lane < CHANNELS) & (c < C)
    inside = (row < ROWS)[:, None] & inside_c[None, :]
    place = n * ROWS * C + row[:, None] * C + c[None, :]

    group = n * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=inside_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside_c, other=0.0)
    gain, offset = _gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside_c
    )
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    xhat = (x - mean[None, :]) * rstd[None, :]
    du = _gradient_of_u(dy, xhat * gain[None, :] + offset[None, :], SILU)
    sum_c, product_c = tl.sum(du, axis=0), tl.sum(du * xhat, axis=0)
    tl.store(sums_ptr + n * 2 * C + c, sum_c, mask=inside_c)
    tl.store(sums_ptr + n * 2 * C + C + c, product_c, mask=inside_c)

    sum_g = _group_sums(gain * sum_c, CPG, BLOCK_C, BLOCK_G) / (ROWS * CPG)
    product_g = _group_sums(gain * product_c, CPG, BLOCK_C, BLOCK_G) / (ROWS * CPG)
    sum_of_c = _of_channels(sum_g, CPG, BLOCK_C, BLOCK_G)
    product_of_c = _of_channels(product_g, CPG, BLOCK_C, BLOCK_G)
    dx = (du * gain[None, :] - sum_of_c[None, :] - xhat * product_of_c[None, :]) * rstd[None, :]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def chunk_gradient_sums(
    dy_ptr,  # [N, rows, C]
    x_ptr,  # [N, rows, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    partial_ptr,  # [N, chunks, 2, C]: sums of du and of du xhat
    scale_stride,
    shift_stride,
    rows,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded at a time
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, block, chunk, chunks = _part(rows, C, TILES, BLOCK_R, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    group = n * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=inside_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside_c, other=0.0)
    gain, offset = _gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside_c
    )
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        row = (chunk * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & inside_c[None, :]
        place = (n * rows + row)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * rstd[None, :]
        du = _gradient_of_u(dy, xhat * gain[None, :] + offset[None, :], SILU)
        total += du
        products += du * xhat
    out = (n * chunks + chunk) * 2 * C + c
    tl.store(partial_ptr + out, tl.sum(total, axis=0), mask=inside_c)
    tl.store(partial_ptr + out + C, tl.sum(products, axis=0), mask=inside_c)


@jit
def merge_gradient_sums(
    partial_ptr,  # [N, chunks, 2, C]
    weight_ptr,  # [C]
    scale_ptr,  # [N, C]
    sums_ptr,  # [N, 2, C]
    group_sums_ptr,  # [N, 2, G]: of gain du and of gain du xhat
    scale_stride,
    chunks,
    C: tl.constexpr,
    CPG: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_CPG: tl.constexpr,
):
    n = (tl.program_id(0) // (C // CPG)).to(tl.int64)
    g = tl.program_id(0) % (C // CPG)
    sum_g = tl.zeros((BLOCK_CPG,), tl.float32)
    product_g = tl.zeros((BLOCK_CPG,), tl.float32)
    for first in range(0, CPG, BLOCK_CPG):
        lane = first + tl.arange(0, BLOCK_CPG)
        c = g * CPG + lane
        inside_c = lane < CPG
        total = tl.zeros((BLOCK_K, BLOCK_CPG), tl.float32)
        products = tl.zeros((BLOCK_K, BLOCK_CPG), tl.float32)
        for start in range(0, chunks, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < chunks)[:, None] & inside_c[None, :]
            place = (n * chunks + k)[:, None] * 2 * C + c[None, :]
            total += tl.load(partial_ptr + place, mask=inside, other=0.0)
            products += tl.load(partial_ptr + place + C, mask=inside, other=0.0)
        sum_c, product_c = tl.sum(total, axis=0), tl.sum(products, axis=0)
        tl.store(sums_ptr + n * 2 * C + c, sum_c, mask=inside_c)
        tl.store(sums_ptr + n * 2 * C + C + c, product_c, mask=inside_c)
        gain, _ = _gain_and_offset(weight_ptr, None, scale_ptr, None, scale_stride, 0, n, c, inside_c)
        sum_g += gain * sum_c
        product_g += gain * product_c
    tl.store(group_sums_ptr + n * 2 * (C // CPG) + g, tl.sum(sum_g, axis=0))
    tl.store(group_sums_ptr + (n * 2 + 1) * (C // CPG) + g, tl.sum(product_g, axis=0))


@jit
def apply_gradient(
    dy_ptr,  # [N, rows, C]
    x_ptr,  # [N, rows, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    group_sums_ptr,  # [N, 2, G]
    dx_ptr,  # [N, rows, C]
    scale_stride,
    shift_stride,
    rows,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded at a time
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, block, chunk = _part_from_the_end(rows, C, TILES, BLOCK_R, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    group = n * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=inside_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside_c, other=0.0)
    values = tl.cast(rows, tl.float32) * CPG
    group_sums_ptr += n * 2 * (C // CPG) + c // CPG
    sum_of_c = tl.load(group_sums_ptr, mask=inside_c, other=0.0) / values
    product_of_c = tl.load(group_sums_ptr + C // CPG, mask=inside_c, other=0.0) / values
    gain, offset = _gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, c, inside_c
    )
    for tile in tl.range(TILES, num_stages=STAGES):
        row = (chunk * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & inside_c[None, :]
        place = (n * rows + row)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * rstd[None, :]
        du = _gradient_of_u(dy, xhat * gain[None, :] + offset[None, :], SILU)
        dx = (du * gain[None, :] - sum_of_c[None, :] - xhat * product_of_c[None, :]) * rstd[None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def parameter_gradients(
    sums_ptr,  # [N, 2, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    dscale_ptr,  # [N, C]
    dshift_ptr,  # [N, C]
    scale_stride,
    N,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = c < C
    weight, bias = _gain_and_offset(weight_ptr, bias_ptr, None, None, 0, 0, 0, c, inside_c)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None] & inside_c[None, :]
        sums = tl.load(sums_ptr + n[:, None] * 2 * C + c[None, :], mask=inside, other=0.0)
        products = tl.load(sums_ptr + n[:, None] * 2 * C + C + c[None, :], mask=inside, other=0.0)
        place = n[:, None] * C + c[None, :]
        if dshift_ptr is not None:
            tl.store(dshift_ptr + place, sums.to(dshift_ptr.dtype.element_ty), mask=inside)
        if dscale_ptr is not None:
            dscale = weight[None, :] * products + bias[None, :] * sums
            tl.store(dscale_ptr + place, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + n[:, None] * scale_stride + c[None, :], mask=inside, other=0.0)
            film = 1.0 + scale.to(tl.float32)
            sums *= film
            products *= film
        dweight += products
        dbias += sums
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=inside_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=inside_c)
