"""What sleep is made of: surprising segments and their statistics, codes, replay, an anchor and synaptic scaling."""
