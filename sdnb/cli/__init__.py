"""The command `sdnb`; papermill and Jupyter Book are used only here."""
