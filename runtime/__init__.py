"""The deployed classifier: numpy, OpenCV and OpenVINO only."""
