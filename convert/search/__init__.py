"""Search of quantization plans: what each module costs at each width, measured over the model's own denoising."""
