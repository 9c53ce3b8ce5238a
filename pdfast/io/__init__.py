"""The ground floor: files, plain data, text, errors."""
