export default {
  // From which hosts pages may be loaded while it is developed.
  allowedDevOrigins: ['*.apps.localhost'],
  devIndicators: false,
}
