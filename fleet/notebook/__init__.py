"""Ranks that stay alive between the cells of a notebook: the object `fleet.Cluster`, and the magic `%%fleet`."""
