"""What is asked beyond answering: constrained text, infill, templates, edits and choices."""
