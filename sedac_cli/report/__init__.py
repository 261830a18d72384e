"""`sedac report`: what a run folder holds, as one page for a reader who was not there. Plots need the extra `report`."""
