import { inEachForm } from './browser.mjs'

inEachForm('jupyter', 'a notebook is opened and a cell run', async (page, address) => {
  page.setDefaultTimeout(90_000)
  await page.goto(`${address}lab/tree/cell.ipynb?token=secret`)
  const cell = page.locator('.jp-CodeCell').first()
  await cell.locator('.cm-content').click()
  await page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').waitFor({ state: 'attached' })
  const output = page.locator('.jp-OutputArea-output').getByText('forty-two')
  // Lab drops what is asked of a kernel that it has not connected to yet.
  for (let i = 0; i < 20 && !(await output.isVisible()); i++) {
    await page.keyboard.press('Control+Enter')
    await output.waitFor({ timeout: 4000 }).catch(() => {})
  }
  await output.waitFor()
}, ['host over TLS'])
