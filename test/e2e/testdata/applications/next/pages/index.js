import { useState } from 'react'

export default function Page() {
  const [pressed, press] = useState(0)
  return (
    <main>
      <h1>first text</h1>
      <button onClick={() => press(pressed + 1)}>pressed {pressed}</button>
    </main>
  )
}
