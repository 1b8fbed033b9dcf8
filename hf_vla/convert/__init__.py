"""Other robot data formats to LeRobotDataset v3.0: RLDS and HDF5 in, by conventions that a user can read and extend."""
