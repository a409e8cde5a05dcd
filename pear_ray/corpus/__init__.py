"""Any corpus in: where its rows are, what each means, which cannot be used. No Ray, no engine."""
