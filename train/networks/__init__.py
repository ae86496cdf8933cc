"""What is computed: backbones, networks, objectives, and how they are stored."""
