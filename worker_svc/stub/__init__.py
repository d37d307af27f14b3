"""The stub engine: a modelled device that proves the plan stream right, and takes the time that a device would take."""
