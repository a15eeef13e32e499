"""What a trained model is worth: likelihoods under q and the joint model, and figures of training logs."""
