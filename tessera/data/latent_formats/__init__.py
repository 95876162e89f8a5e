"""Files and folders of latents: our own and those of released code, one module a format."""
