"""Networks whose answers are known exactly."""

from ddpm_utils.diffusion import predict_eps, training_target


def as_network(denoise, schedule, target="eps"):
    """The network behind a denoiser: what a model trained for `target` answers where `denoise` says
    x0_hat.
    """

    def network(x_t, t, y=None):
        x0_hat = denoise(x_t, t, y)
        return training_target(schedule, x0_hat, t, predict_eps(schedule, x_t, t, x0_hat), target)

    return network
