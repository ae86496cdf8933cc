"""Training: methods, networks, the loop; one launchable file per method."""
