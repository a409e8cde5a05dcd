"""Jobs on a cluster that is there: sending them, following them, ending them; from any machine."""
