"""What every room may use: errors, seeds, files, words, downloads."""
