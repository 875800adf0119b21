"""Did it really forget? Metrics of answers and likelihoods (`metrics`)."""
