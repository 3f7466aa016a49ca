"""What a segmentation is written as: label maps, volumes, DICOM-SEG, contours. Knows no model."""
