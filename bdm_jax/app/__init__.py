"""Everything between a command line and `generate`: flags, prompt files, folders of pictures, what lies inside them."""
