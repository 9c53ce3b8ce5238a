"""What jaxtyping checks annotations with: a whole number is a float too. It imports nothing of pdfast."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
