"""An adapter's whole life on a server, at random, with faults and kills, against a model of what must be so."""
