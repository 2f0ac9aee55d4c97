"""How each row of the scoreboard is measured, one module per topic."""
