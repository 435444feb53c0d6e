"""The page over a folder of runs: it reads them, and starts commands; it owns nothing."""
