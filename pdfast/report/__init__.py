"""What a run shows: metrics in named feature spaces, sample grids, plots, the plan and the HTML report."""
