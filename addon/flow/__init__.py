"""Follow each flow to its end and copy its raw facts into an Exchange."""
