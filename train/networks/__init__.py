"""What is computed: backbones, networks, objectives; and trained models as files."""
