"""Read interactions in every format, check them, and make vocabularies, sequences and training windows."""
