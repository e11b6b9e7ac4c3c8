"""Where to divide time into stages: by timestep, SNR, gradients or the optimal denoiser."""
