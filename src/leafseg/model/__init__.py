"""The networks: U-Net, image encoder, autoencoder, projector and teachers, and how settings become them."""
