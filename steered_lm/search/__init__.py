"""Search for the weights of a steering spec: ask/tell protocol, run log, driver. numpy only, no model and no harness."""
