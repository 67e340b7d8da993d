"""What `ica-plugin` does beside validating: score, select, report, audit."""
