"""One module a family of quantizers: from our configuration to theirs."""
