"""`plan`: memory and time of a run, predicted from the models' configurations."""
