"""What all operations share: which implementation runs, launches, indices, memory formats, block sizes."""
