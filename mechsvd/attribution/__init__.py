"""Attribution: derivatives of an output; Hessian eigenbases, gradients, estimates."""
