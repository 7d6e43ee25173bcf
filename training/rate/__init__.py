"""The learning rate: range test, halving over candidates, sweeps."""
