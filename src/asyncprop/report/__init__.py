"""Report: what run folders and figures say, as tables. It reads files and dictionaries, and trains nothing."""
