"""From noise to blocks of text: options, events, the sampler, canvases, steps and the block loop. It knows no text."""
