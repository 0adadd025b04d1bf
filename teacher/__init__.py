"""K-fold teachers and their out-of-fold soft labels."""
