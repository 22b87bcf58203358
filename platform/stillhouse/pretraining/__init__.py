"""Plain training that makes a teacher where none can be had."""
