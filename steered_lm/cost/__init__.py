"""What a steering spec buys and costs: specs and sweeps, measures, finished cells, and the run that fills a page."""
