"""Other people's models on this operator. Each module here imports the package that it is named after."""
