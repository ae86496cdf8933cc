"""What is computed: backbones and networks; and trained models as files."""
