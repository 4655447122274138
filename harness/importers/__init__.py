"""Other tools' results, read into the same rows as our own.

Each importer turns one file of one tool into `sample.Sample`, row by row, and says what that tool cannot know. None of
them guesses: an intended time that was not recorded stays null, and a file of aggregates is refused with a sentence
that says what to export instead. Reading order: `formats` (which there are), `source` (the file, line by line),
`recognise` (what it is), `fields` and `rows` (numbers, instants and requests out of text), then one module per tool,
and `intake` (from a file to a closed sample set).
"""
