"""What hardens: one module a rig, each with ``run(options) -> Result``; the command finds them."""
