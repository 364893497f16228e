"Networks. Importing the package registers every model builder."
from . import conv, lipschitz, lstm, mlp, pixelcnn, resnet
from .vae import MODELS, VAE, Bernoulli, Decoder, Encoder, Likelihood, Normal, build_model, model_builder
