"""HTML pages that stand alone: the report of an evaluation or of a human study."""
