"""Ground: errors in a sentence, text, files and downloads, for every other room."""
