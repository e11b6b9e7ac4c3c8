"""Methods that find the boundaries of stages: by timestep, SNR, gradients or the optimal denoiser (2312.09181)."""
